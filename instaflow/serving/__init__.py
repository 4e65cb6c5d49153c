"""A local page and a JSON API: requests, their turns, who may ask, the page. Who draws is handed in."""
