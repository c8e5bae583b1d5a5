"""MetaLadder's training data (arXiv 2503.14891): problems, analogous problems, and the forms in which a model is trained on them."""
