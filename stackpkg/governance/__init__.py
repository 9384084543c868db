"""What a reviewer needs: the checklist from evidence, cards for data and model, the seal and its signatures."""
