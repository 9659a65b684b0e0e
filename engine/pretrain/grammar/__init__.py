"""The grammar of the bundled model's corpus: scikit-learn programs, mistakes in them, and their repairs."""
