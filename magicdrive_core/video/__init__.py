"""Pictures and videos for people: encoding, contact sheets, overlays."""
