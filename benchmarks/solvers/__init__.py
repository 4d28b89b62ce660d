"""Our bounds beside those of an integer program, and beside α-CROWN of softmax."""
