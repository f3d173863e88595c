"""The method on a model: the layer, the controller of re-initializations, the conversion."""
