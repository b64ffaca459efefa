"""Analysis and rewriting of a module's forward: the call graph, fx traces, fusion patterns, a rewritten subclass."""
