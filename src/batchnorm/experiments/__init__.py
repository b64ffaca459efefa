"""The experiments of the paper, one file a claim: claim, where in the paper, expected band, verdict."""
