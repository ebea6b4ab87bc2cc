"""From a bundle to HTTP: the service that `bentoml serve` runs.

Importing this package turns BentoML's usage tracking off, unless BENTOML_DO_NOT_TRACK says otherwise.
"""

import os
import sys

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
# BentoML's own command line has asked before it imports a service, and remembers what it was told.
_asked = sys.modules.get("bentoml._internal.utils.analytics.usage_stats")
if _asked is not None:
    _asked.do_not_track.cache_clear()
