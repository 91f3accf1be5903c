"""Pre-training and fine-tuning with SAL, on one CPU, one GPU or many."""
