"""`calibrate`: codecs fitted to a model, each in a file that `--codec` takes."""
