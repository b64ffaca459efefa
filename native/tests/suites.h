#pragma once

namespace batchnorm::tests {

void numbers();     // bfloat16 and float16, there and back
void values();      // nan, inf, running statistics
void accuracy();    // large means, and data that are hard on sums
void shapes();      // everything against the oracle
void large();       // the same, larger
void selections();  // results that are not wanted
void groups();      // moments of each group, and of more values than those at hand

}  // namespace batchnorm::tests
