"""The parts of the demonstration: training, measuring, charts and the page."""
