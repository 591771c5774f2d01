"""The films behind a run's figures: a page of its errors, with pictures, heat maps and the nearest training films."""
