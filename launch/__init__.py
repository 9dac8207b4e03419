"""Where and when to compute: the only Python here that knows submitit and SLURM."""
