"""What a program is: values, op set, text, weights, files, and meaning in double precision."""
