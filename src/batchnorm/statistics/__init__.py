"""Where the moments come from that a training batch is normalised by: the `statistics=` of a layer.

Each is a small object that is asked once a batch. In evaluation none of them is: running statistics normalise,
whoever moved them, so that every layer can be folded alike.
"""

from batchnorm.statistics.batch import Statistics as Statistics
from batchnorm.statistics.ghost import Ghost as Ghost
from batchnorm.statistics.population import Population as Population
from batchnorm.statistics.renorm import Ramp as Ramp
from batchnorm.statistics.renorm import Renorm as Renorm
from batchnorm.statistics.sync import Sync as Sync
