// native_tests [suite ...]: status 1 when something fails.
#include <cstring>
#include <chrono>

#include "check.h"
#include "suites.h"

using namespace batchnorm::tests;

int main(int count, char** words) {
  const struct {
    const char* name;
    void (*run)();
  } suites[] = {{"numbers", numbers}, {"values", values}, {"accuracy", accuracy},
                {"shapes", shapes},   {"large", large},   {"selections", selections},
                {"groups", groups}};
  for (const auto& suite : suites) {
    bool wanted = count == 1;
    for (int i = 1; i < count; i++) wanted |= std::strcmp(words[i], suite.name) == 0;
    if (!wanted) continue;
    const int before = failures;
    const auto start = std::chrono::steady_clock::now();
    suite.run();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%s: %d failures, %.1f s\n", suite.name, failures - before, seconds.count());
    std::fflush(stdout);
  }
  return failures != 0;
}
