"""Work in, records out: a stage is a loader and a generator. Knows models and records, neither files of a run nor a scheduler."""
