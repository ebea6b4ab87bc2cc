"""Side by side with peers: what is claimed of speed and accuracy, with the commands that measure it."""

# Says how OpenMP's threads wait, which it must before any benchmark loads torch.
import training as training
