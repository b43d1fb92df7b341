"""What a model answers: denoising step by step, and the prediction of answers of known and unknown length.

Training and what goes on inside the model do not belong here.
"""
