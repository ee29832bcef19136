"""One network of features a file, each with `load(weights) -> Extractor`."""
