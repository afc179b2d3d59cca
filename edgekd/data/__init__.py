"""From folders of labelled images to splits and preprocessed batches; needs no torch."""
