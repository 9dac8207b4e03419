"""The scores of a finished video. Knows no run folder, no stage, no scheduler."""
