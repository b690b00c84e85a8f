"""The name under which scans offer `jax.checkpoint` policies what their backward needs of the forward."""

SCAN_RESIDUALS = "scan_residuals"
