"""What a model answers: denoising step by step, the prediction of answers of known and unknown length, and likelihoods.

Training and what goes on inside the model do not belong here.
"""
