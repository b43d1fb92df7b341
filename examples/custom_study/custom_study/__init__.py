"""A study of one's own: every module here with an `ANALYSIS` becomes a figure of `mdm-interp reproduce`."""
