"""What a run shows of itself: metrics, TensorBoard, progress, curves and the report."""
