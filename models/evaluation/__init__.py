"""How good an encoder is, by features on labelled images that no device trained on, or by training it further."""
