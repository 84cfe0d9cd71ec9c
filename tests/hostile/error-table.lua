-- tries: an error that is no text
-- expect: error() was given a table
error({})
