"""Language models: loading, forwards, adapters, roles, drawing tokens, and how a state is put to a model."""
