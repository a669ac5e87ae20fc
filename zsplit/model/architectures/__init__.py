"""The networks of the systems that this one follows, one file for each family. `zsplit.model.zoo` gives them names."""
