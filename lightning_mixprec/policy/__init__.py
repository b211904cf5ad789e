"""Rules and policies, and the formats that they give the layers of a model. Touches no tensor."""
