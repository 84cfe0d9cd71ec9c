-- tries: the same through _G
-- expect: field 'io'
_G._G["io"].open("escaped", "w")
