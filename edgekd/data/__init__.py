"""From folders of labelled images to batches: scanning, checking, splitting, augmenting, generating, downloading."""
