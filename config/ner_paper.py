"""Tuning for Universal NER as in Africa et al. 2025 (https://arxiv.org/abs/2509.02160).

One small learning rate serves everything, and nothing stops early.

At this rate a head on frozen features hardly moves in ten epochs; the defaults of eval_ner.py train it.
"""
lr = head_lr = 3e-5
batch_size, length = 16, 128
epochs = head_epochs = 10
patience = 0  # the paper speaks of early stopping, its released code has none
label_at = "first"
