"""What only the released weights and the published golden files need."""
