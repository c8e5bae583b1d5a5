"""One file per verb that is no training job."""
