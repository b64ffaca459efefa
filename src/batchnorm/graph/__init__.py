"""How the forward of a module is read and rewritten: calls, traces, patterns, a subclass with a new forward."""
