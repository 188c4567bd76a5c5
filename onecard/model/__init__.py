"""The base model: loading, quantisation, attention, the loss, the device."""
