"""Work in, records out: a stage is a loader and a generator. Knows models and records, not a run's files, no scheduler."""
