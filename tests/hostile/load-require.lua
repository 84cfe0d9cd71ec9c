-- tries: a module
-- expect: global 'require'
require("os").exit()
