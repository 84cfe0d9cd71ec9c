-- tries: a for loop that does not advance
-- expect: 'for' step is zero
for i = 1, 2, 0 do end
