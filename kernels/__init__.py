"""What is computed: the two ops, their references and their blocked forms."""
