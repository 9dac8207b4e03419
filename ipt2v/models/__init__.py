"""Published weights -> plain callables. Knows no run folder, no stage, no scheduler."""
