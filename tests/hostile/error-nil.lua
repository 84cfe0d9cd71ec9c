-- tries: an error that is nothing
-- expect: error() was given a nil
error(nil)
