"""Face detection, cropping, landmarks, parsing and blending: shared by recipes and by prediction."""
