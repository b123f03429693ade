"""What every HTTP server of the house holds to, whatever it serves: the API and local inference."""
