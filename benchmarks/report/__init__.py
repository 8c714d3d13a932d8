"""Documents and pictures made of the committed result files: ``python -m benchmarks.report``. No torch is needed."""
