"""The paper's tables: every method pre-trained once, fine-tuned on folds × M, and compared."""
