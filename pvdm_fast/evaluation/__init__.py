"""How good a trained run is: reconstruction and generation scores, their protocol, and a report."""
