"""Fold batch normalization in evaluation into its neighbours, with proof.

It works on a copy, whose class, children's names and forward stay: the place of a folded layer is taken by what follows
the normalization in it, an Identity if nothing does. What is before and behind a layer is observed in one run
(graph/observation.py), so that reshapes, concatenation, sums and pooling may lie in between (graph/sources.py).

preceding: into the linear operations before · beside, branches: into one that reads the same · following: into those
behind · remaining: as a factor and a term of each channel. A `Plan` says what one of these would change, and how it can
be seen to be right; `folded` makes rounds of plans until there are none.
"""

from batchnorm.passes.fold.folded import FoldReport as FoldReport
from batchnorm.passes.fold.folded import fold as fold
