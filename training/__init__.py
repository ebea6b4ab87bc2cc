"""Training: labelled images in, a run directory out. The only package, with export, that uses torch."""

import os

# Read when torch loads its OpenMP: threads that wait by spinning make an epoch five to ten times as long as soon as
# another process wants a core; sleeping costs little where none does.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
