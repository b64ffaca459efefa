"""What turns a whole model into another: each pass takes a model and returns it with a report, layer by layer."""
